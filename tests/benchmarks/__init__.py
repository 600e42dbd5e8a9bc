"""``make bench``: figures of one quiet machine; ratios from one run, medians of several."""
