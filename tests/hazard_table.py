"""Families of bad inputs and faults, each variant with the tests that meet it (beginnings of node ids)."""

from __future__ import annotations

Tests = str | tuple[str, ...]

SENT = "test_malformed_uploads.py::test_it_is_refused_and_nothing_is_kept["
FRAMED = "test_malformed_uploads.py::test_a_body_that_is_not_what_its_headers_say_keeps_nothing["
EXPENSIVE = "test_tensors.py::test_an_expensive_header_is_refused_for_a_few_megabytes_and_milliseconds["
PEFT_SERVED = "test_validation_peft.py::test_it_is_served_with_pefts_numbers["
PEFT_REFUSED = "test_validation_peft.py::test_it_is_refused_by_name_saying_what_to_do["
VALUES = "test_validation.py::"
INACTIVE = "test_lora_config.py::test_what_has_no_effect_on_answers_is_accepted["
SERVING = "test_uploads_while_serving.py::"
STORE_ID = "test_store.py::test_ids_that_look_special_are_just_ids["
USER_ID = "test_core.py::test_what_is_no_user_id_is_refused_shortly_and_not_repeated["
FINE_ID = "test_core.py::test_what_only_looks_special_is_an_id_like_any_other["


SAFETENSORS_BYTES: dict[str, Tests] = {
    "empty": f"{SENT}safetensors: empty]",
    "1 to 7 bytes": tuple(f"{SENT}safetensors: {count} bytes]" for count in range(1, 8)),
    "header length 2**64 - 1": f"{SENT}safetensors: header of 2**64 - 1]",
    "header length 101 MB": f"{SENT}safetensors: header of 101 MB]",
    "header length 1 MiB + 1": f"{SENT}safetensors: header of 1 MiB + 1]",
    "header length negative-like": f"{SENT}safetensors: header of 2**63]",
    "not JSON": f"{SENT}safetensors: not JSON]",
    "not UTF-8": f"{SENT}safetensors: not UTF-8]",
    "truncated": (f"{SENT}safetensors: cut off]", f"{SENT}safetensors: header longer than the file]"),
    "trailing bytes": f"{SENT}safetensors: trailing bytes",
    "overlap": f"{SENT}safetensors: overlap]",
    "hole": f"{SENT}safetensors: hole",
    "reversed offsets": f"{SENT}safetensors: offsets reversed]",
    "float offsets": f"{SENT}safetensors: offsets are floats]",
    "duplicate keys": f"{SENT}safetensors: same name twice]",
    "size overflow": (
        f"{SENT}safetensors: shape whose product overflows]",
        f"{SENT}safetensors: offsets far behind the file]",
    ),
    "10,000 dimensions": f"{EXPENSIVE}10,000 dimensions]",
    "zero size": f"{SENT}safetensors: shape with a zero]",
    "unknown dtype": f"{SENT}safetensors: dtype 'f32']",
    "int dtypes": tuple(f"{SENT}safetensors: dtype '{dtype}']" for dtype in ("I64", "I32", "I8", "U8")),
    "bool dtype": f"{SENT}safetensors: dtype 'BOOL']",
    "F8 dtypes": f"{SENT}safetensors: dtype 'F8_",
    "F64 dtype": f"{SENT}safetensors: dtype 'F64']",
    "metadata that is not text": f"{SENT}safetensors: metadata not text]",
    "deep JSON": f"{EXPENSIVE}deep JSON]",
    "1M names": f"{EXPENSIVE}1M names]",
    "NUL in a name": f"{SENT}safetensors: name with NUL]",
    "../ in a name": f"{SENT}weights: a path with dots]",
    "a name of 100 kB": f"{EXPENSIVE}a name of 100 kB]",
    "byte order mark": f"{SENT}safetensors: byte order mark]",
    "pickle renamed .safetensors": f"{SENT}safetensors: a pickle, renamed]",
    "zip bomb": f"{SENT}archive: bomb:",
    "sparse file": (
        "test_store.py::test_a_sparse_giant_is_refused_without_reading_it_all",
        "test_cli_check.py::test_a_sparse_giant_is_refused_before_it_is_read",
        f"{SENT}archive: sparse sparse of type",
    ),
}

ADAPTER_CONFIG: dict[str, Tests] = {
    "not JSON": f"{SENT}config: not JSON]",
    "a list": f"{SENT}config: a list]",
    "10 MB": f"{SENT}config: 10 MB]",
    "deep nesting": f"{SENT}config: deep]",
    "missing": f"{SENT}body: no adapter_config.json]",
    "r 0": f"{SENT}config: r = 0]",
    "r -4": f"{SENT}config: r = -4]",
    "r 4.0": f"{SENT}config: r = 4.0]",
    'r "8"': f'{SENT}config: r = "8"]',
    "r 2e6": f"{SENT}config: r = 2000000]",
    "r a bool": f"{SENT}config: r = true]",
    "r is not the shape's": f"{SENT}config: r of another rank]",
    "rank_pattern huge": f"{SENT}config: rank_pattern = {{'q_proj': 2000000}}]",
    "rank_pattern a regex": (f'{SENT}config: rank_pattern = {{".*": 4}}]', f"{PEFT_REFUSED}rank_pattern is"),
    "rank_pattern a ReDoS": f'{SENT}config: rank_pattern = {{"(a+)+$": 4}}]',
    "alpha NaN": f"{SENT}config: NaN]",
    "alpha Infinity": f"{SENT}config: Infinity]",
    "alpha 1e38": f"{SENT}config: lora_alpha = 1e+38]",
    'alpha "16"': f'{SENT}config: lora_alpha = "16"]',
    "alpha 0": f"{SENT}config: lora_alpha = 0",
    "alpha negative": f"{PEFT_SERVED}alpha negative]",
    "target_modules a ReDoS": f"{INACTIVE}ReDoS",
    'target_modules ".*"': f"{INACTIVE}any module",
    "target_modules []": f"{INACTIVE}no module",
    "target_modules unknown": f"{VALUES}test_what_is_odd_but_harmless_warns[no tensors for",
    "bias all": (f"{PEFT_SERVED}bias all", "test_validation_peft.py::test_biases_are_refused_where_the_base"),
    "use_dora": (f"{SENT}config: use_dora = true]", f"{PEFT_REFUSED}DoRA]"),
    "use_rslora and patterns": f"{PEFT_SERVED}rsLoRA and both patterns]",
    "modules_to_save": (f"{SENT}config: modules_to_save", f"{PEFT_REFUSED}modules_to_save]"),
    "trainable tokens": (f"{SENT}config: trainable_token_indices", f"{PEFT_REFUSED}trainable tokens]"),
    "target_parameters": (f"{SENT}config: target_parameters", f"{PEFT_REFUSED}target_parameters]"),
    "layer_replication": (f"{SENT}config: layer_replication", f"{PEFT_REFUSED}layer_replication]"),
    "aLoRA": (f"{SENT}config: alora_invocation_tokens", f"{PEFT_REFUSED}aLoRA]"),
    "QALoRA": (f"{SENT}config: use_qalora", f"{PEFT_REFUSED}QALoRA]"),
    "BD-LoRA": (f"{SENT}config: use_bdlora", f"{PEFT_REFUSED}BD-LoRA]"),
    "Arrow, KaSA, VeLoRA, MonteCLoRA": (
        f"{SENT}config: arrow_config",
        f"{PEFT_REFUSED}KaSA]",
        f"{PEFT_REFUSED}VeLoRA]",
        f"{PEFT_REFUSED}MonteCLoRA]",
    ),
    "PiSSA and other inits": (
        f"{SENT}config: init_lora_weights =",
        f"{PEFT_REFUSED}PiSSA]",
        f"{PEFT_REFUSED}OLoRA]",
        "test_validation_peft.py::test_an_init_that_moves_the_base_is_served_once_converted[pissa",
    ),
    "Megatron": f"{SENT}config: megatron_config",
    "auto_mapping": f"{SENT}config: auto_mapping",
    "peft_type unknown": f"{SENT}config: peft_type = [",
    "peft_type in lower case": f'{SENT}config: peft_type = "lora"]',
    "peft_type VERA": (f'{SENT}config: peft_type = "VERA"]', f"{PEFT_REFUSED}VeRA]"),
    "peft_type of the others": tuple(
        f"{PEFT_REFUSED}{kind}]"
        for kind in ("IA3", "LoHa", "LoKr", "AdaLoRA", "OFT", "prefix tuning", "prompt tuning")
    ),
    "another base model's id": "test_base_names.py::test_any_other_name_is_a_warning_that_says_what_is_known",
    "layers_to_transform out of range": f"{PEFT_SERVED}layers_to_transform out of range]",
    "unknown active field": f"{SENT}config: a_field_of_tomorrow",
    "unknown null field": f"{INACTIVE}unknown and null",
    "runtime_config": f"{INACTIVE}runtime_config",
}

WEIGHTS: dict[str, Tests] = {
    "NaN": f"{SENT}weights: NaN",
    "infinity": (f"{SENT}weights: infinity", f"{SENT}weights: minus infinity]"),
    "denormals": (
        f"{VALUES}test_denormal_weights_are_served_while_the_adapter_has_an_effect",
        f"{VALUES}test_effect_and_range_are_those_of_the_dtype_that_is_served[1e-42-float32",
    ),
    "bf16, fp16, fp32 mixed; fp8": (
        f"{VALUES}test_dtypes_may_be_mixed_and_ranks_may_differ",
        f"{SENT}safetensors: dtype 'F8_",
    ),
    "A missing": f"{SENT}weights: A missing]",
    "B missing": f"{SENT}weights: B missing]",
    "a module too many": f"{SENT}weights: output head]",
    "wrong input or output size": (f"{SENT}weights: A too wide]", f"{SENT}weights: B too long]"),
    "wrong layer": f"{SENT}weights: another layer]",
    "transposed": (f"{SENT}weights: A transposed]", f"{SENT}weights: B transposed]"),
    "rank 1": (
        f"{PEFT_SERVED}rank 1]",
        f"{VALUES}test_each_dtype_at_the_smallest_and_largest_rank_is_served[1-",
    ),
    "the largest rank": f"{VALUES}test_each_dtype_at_the_smallest_and_largest_rank_is_served[64-",
    "a rank more": f"{SENT}weights: rank above the limit]",
    "all zero": f"{SENT}weights: all zero]",
    "keys with and without base_model.model.": f"{VALUES}test_names_without_prefix_or_with_the_adapters_name",
}

UPLOADS: dict[str, Tests] = {
    "0 bytes": f"{SENT}body: nothing]",
    "over the limit by 1": f"{SENT}body: one byte over the limit]",
    "a lying Content-Length": f"{FRAMED}length",
    "chunked, over the limit": f"{SENT}body: one byte over the limit, in chunks]",
    "cut at 1 %": (f"{SENT}body: cut at 1%]", f"{FRAMED}zip cut at 1%]", f"{FRAMED}chunks cut at 1%]"),
    "cut at 50 %": (f"{SENT}body: cut at 50%]", f"{FRAMED}zip cut at 50%]", f"{FRAMED}chunks cut at 50%]"),
    "cut at 99 %": (f"{SENT}body: cut at 99%]", f"{FRAMED}zip cut at 99%]", f"{FRAMED}chunks cut at 99%]"),
    "slow loris": (
        "test_http_receive.py::test_a_client_that_stops_sending_gets_a_408",
        "test_http_receive.py::test_a_real_connection_that_stops_is_answered_and_leaves_nothing",
    ),
    "wrong sha256": f"{SENT}body: Content_Digest",
    "the same upload again": (
        "test_http_adapters.py::test_every_way_to_upload_the_same_bytes_is_the_same_version",
        "test_repeats.py::test_the_same_upload_again_is_answered_as_before_whatever_happened_since",
    ),
    "two at once for one user": (
        "test_store.py::test_pushes_at_once_get_a_version_each",
        "test_store.py::test_two_processes_pushing_for_one_user_make_two_versions",
    ),
    "upload while serving": f"{SERVING}test_an_upload_is_acknowledged_though_answers_hang",
    "delete while serving": "test_http_users.py::test_a_deleted_users_answers_end_and_others_go_on",
    "replace while serving": (
        f"{SERVING}test_answers_under_way_end_with_the_version_they_began_with",
        f"{SERVING}test_a_refused_upload_leaves_the_live_version_answering",
    ),
    "1001 fields": f"{SENT}body: 1001 parts]",
    "a huge part's header": (
        f"{SENT}body: part's header of 20 kB]",
        f"{SENT}body: part with 1000 headers]",
    ),
    "preamble flood": f"{SENT}body: preamble flood]",
    "missing boundary": (f"{SENT}body: no boundary]", f"{SENT}body: empty boundary]"),
    "file name ../../x": (
        "test_http_adapters.py::test_a_parts_file_name_means_nothing",
        f"{SENT}body: path as part]",
        f"{SENT}archive: '../adapter_config.json'",
    ),
    "NUL in a name": (f"{SENT}body: NUL in a part's name]",),
    "Unicode NFC and NFD": f"{SENT}body: a part's name twin]",
    "gzip as Content-Encoding": f"{SENT}body: Content_Encoding: gzip]",
    "links in archives": (
        f"{SENT}archive: symbolic link",
        f"{SENT}archive: hard link",
        f"{SENT}archive: link in a zip]",
    ),
    "duplicates in archives": (f"{SENT}archive: twice in", f"{SENT}archive: two adapters in"),
}

IDS: dict[str, Tests] = {
    "empty": f"{USER_ID}empty]",
    "1 MB": f"{USER_ID}1 MB]",
    "..": (f"{USER_ID}two dots]", f"{USER_ID}a dot]"),
    "/": f"{USER_ID}a slash]",
    "%2e%2e": (
        f"{USER_ID}encoded dots]",
        "test_http_boundary.py::test_an_id_that_can_not",
    ),
    "\\": f"{USER_ID}backslash]",
    "NUL": f"{USER_ID}NUL]",
    "newline": f"{USER_ID}newline",
    "colon forms": (f"{FINE_ID}colon forms]", f"{FINE_ID}a colon alone]"),
    "__base__": (
        f"{FINE_ID}the base's name]",
        f"{STORE_ID}__base",
    ),
    "default": (f"{FINE_ID}default]", f"{STORE_ID}default]"),
    "prefixes": f"{STORE_ID}a1]",
    "case twins": "test_catalog.py::test_any_two_ids_are_two_users_in_one_order_on_every_database",
    "Unicode twins": (f"{USER_ID}unicode twin]", f"{USER_ID}NFC]", f"{USER_ID}NFD]", f"{USER_ID}fullwidth]"),
    "emoji": f"{USER_ID}emoji]",
    "SQL quote": f"{USER_ID}SQL quote]",
    "${} and {{}}": (f"{USER_ID}shell]", f"{USER_ID}template]"),
    "a URL of the cloud's metadata": f"{USER_ID}URL]",
    "s3://other": f"{USER_ID}another store]",
    "leading dash": f"{FINE_ID}leading dash]",
}


def _faults(*names: str) -> tuple[str, ...]:
    """Of an object store, met on both real servers."""
    test = "test_tier_faults.py::test_a_fault_hurts_only_who_asks_for_what_is_not_cached"
    return tuple(f"{test}[{server}-{name}]" for server in ("JuiceFS", "SeaweedFS") for name in names)


OBJECT_STORE: dict[str, Tests] = {
    "refused": "test_s3_store.py::test_a_refused_port_fails_soon",
    "500 once": (
        "test_tier_faults.py::test_a_fault_that_is_over_at_once_hurts_nobody[JuiceFS-Fault.ERROR]",
        "test_tier_faults.py::test_a_fault_that_is_over_at_once_hurts_nobody[SeaweedFS-Fault.ERROR]",
    ),
    "500 five times": _faults("500 five times"),
    "503 SlowDown": _faults("503 SlowDown"),
    "hang": (*_faults("hang"), "test_s3_store.py::test_a_server_that_hangs_is_given_up_on"),
    "cut at 1 %": (*_faults("cut at 1 %"), "test_s3_store.py::test_a_stream_that_is_cut_is_an_error[0.01]"),
    "cut at 50 %": (*_faults("cut at 50 %"), "test_s3_store.py::test_a_stream_that_is_cut_is_an_error[0.5]"),
    "cut at 99 %": (*_faults("cut at 99 %"), "test_s3_store.py::test_a_stream_that_is_cut_is_an_error[0.99]"),
    "wrong bytes of the same length": (
        *_faults("one wrong byte"),
        "test_tiers.py::test_a_wrong_byte_in_the_store_is_never_served",
    ),
    "wrong length": (
        *_faults("a length that is none"),
        "test_tier_faults.py::test_other_bytes_under_a_key_are_never_served",
    ),
    "404 of what the catalog knows": _faults("404"),
    "403": _faults("403"),
    "expired credentials": _faults("expired credentials"),
    "clock skew": _faults("clock skew"),
    "ETag changes during a download": (
        "test_tier_faults.py::test_an_object_that_is_replaced_in_the_middle_of_a_download_is_not_mixed",
        "test_downloads.py::test_an_object_that_changes_meanwhile_is_noticed",
    ),
    "disk full in the local cache": (
        "test_tier_faults.py::test_a_full_disk_hurts_only_what_is_not_cached",
        "test_tiers.py::test_a_full_cache_disk_hurts_only_what_is_not_cached",
    ),
    "poisoned file in the local cache": "test_tiers.py::test_a_poisoned_disk_copy_is_replaced_from_the_store",
    "part of an upload left behind": (
        "test_s3_store.py::test_a_put_whose_part_fails_leaves_no_object_and_no_parts",
        "test_collecting.py::test_files_of_an_upload_go_when_it_has_expired_and_not_before",
    ),
    "store killed and restarted": (
        "test_tier_faults.py::test_a_store_that_was_killed_is_used_again_once_it_is_back",
        "test_s3_store.py::test_what_was_acknowledged_survives_a_killed_server",
    ),
}

DATABASE: dict[str, Tests] = {
    "locked": (
        "test_database.py::test_a_sqlite_that_is_locked_for_long_is_busy",
        "test_database.py::test_a_postgres_row_that_is_locked_for_long_is_busy",
    ),
    "killed in a commit": (
        "test_catalog_processes.py::test_a_process_killed_anywhere_in_a_transaction_leaves_nothing_of_it",
        "test_database.py::test_a_connection_that_is_lost_in_a_commit_says_that_it_may_have_happened",
        "test_crash_matrix.py::test_a_process_killed_at_any_step_loses_nothing_and_leaves_nothing_half",
    ),
    "disk full": "test_database.py::test_a_full_disk_is_told_loses_nothing_and_passes",
    "two writers of one version": (
        "test_catalog_processes.py::test_two_uploads_at_once_for_a_new_user_are_two_versions",
        "test_catalog_processes.py::test_threads_that_upload_at_once_get_a_number_each_without_a_gap",
    ),
    "stale reads": "test_catalog_processes.py::test_of_two_processes_that_promote_at_once_one_wins",
    "pool exhausted": "test_database.py::test_when_all_connections_are_in_use_the_next_caller_is_told_soon",
    "migration twice at once": "test_revisions.py::test_processes_that_open_a_new_catalog_at_once",
    "downgrade": (
        "test_revisions.py::test_a_database_of_a_newer_release_is_refused_and_left_alone",
        "test_revisions.py::test_there_is_no_way_back",
    ),
    "Postgres restarts": "test_database.py::test_after_a_restart_of_postgres_the_next_request_works",
    "clock jumps": (
        "test_catalog.py::test_a_clock_that_goes_back_takes_nothing_away",
        "test_routers.py::test_a_claim_from_before_the_clock_went_back_is_no_claim",
    ),
    "1M users: no statement scans a table": (
        "test_query_plans.py::test_every_method_is_looked_at_and_sends_no_scan",
        "test_query_plans.py::test_a_lookup_searches_unique_indexes_only",
    ),
}

HOT_SWAP: dict[str, Tests] = {
    "100 requests for one cold adapter": "test_hot_swap.py::test_a_hundred_at_once_for_one_cold_adapter",
    "one adapter more than slots": "test_hot_swap.py::test_one_adapter_more_than_slots",
    "evict in flight": "test_slots.py::test_a_pinned_adapter_stays_and_the_newcomer_waits",
    "new bytes in the middle of an answer": "test_named_faults.py::test_areal_1197",
    "rollback": "test_hot_swap.py::test_after_a_rollback",
    "deleted and made again": "test_named_faults.py::test_vllm_42125_an_adapter_that_was_deleted",
    "cancel during load, prefill, decode": "test_hot_swap.py::test_who_is_cancelled_frees_everything",
    "n > 1": "test_named_faults.py::test_sglang_36894_25864",
    "a load that raises": "test_hot_swap.py::test_a_load_that_fails_takes_no_slot",
    "a slot after a failed load": "test_slots.py::test_a_fill_that_fails_frees_the_slot",
    "a slot used again": "test_engine.py::test_a_slot_that_is_used_again_shows_nothing",
    "A and B by turns over one prefix": "test_hot_swap.py::test_two_that_take_turns",
    "ranks mixed": "test_engine.py::test_mixed_adapters_of_every_shape",
    "1 corrupt of 100": "test_hot_swap.py::test_one_corrupt_adapter_of_a_hundred",
    "order of arrival": "test_hot_swap.py::test_the_order_in_which_they_came",
    "planted secrets": "test_planted_secrets.py::test_nobody_hears_anothers_code_word",
}

PROCESSES: dict[str, Tests] = {
    "kill -9 of a replica in mid-stream": "test_machine.py::test_a_killed_replica_loses_no_token",
    "kill -9 of a starting replica": "test_supervisor.py::test_a_start_that_is_killed",
    "kill -9 of the host process": (
        "test_machine.py::test_a_killed_host_process",
        "test_host.py::test_a_drained_host_process_loses_nothing_and_a_killed_one",
    ),
    "kill -9 of the parked process": "test_machine.py::test_a_killed_parked_process",
    "kill -9 of a router": "test_machine.py::test_a_killed_router",
    "a request that ends replicas": "test_trials.py::test_a_request_that_ends_replicas_fails_alone",
    "an exception in a step": "test_engine_faults.py::test_a_prompt_that_makes_the_model_raise_ends_alone",
    "a batch too large for the device": "test_engine_faults.py::test_a_batch_too_large",
    "a step that hangs": "test_watchdog.py::test_a_step_that_hangs",
    "a process that may not fork": "test_parking.py::test_what_may_not_be_forked_starts_as_a_fresh_process",
    "SIGTERM": (
        "test_serve.py::test_a_signal_lets_a_stream_finish",
        "test_supervisor.py::test_a_leaving_host_process_lets_its_replicas_finish",
    ),
    "SIGTERM twice": (
        "test_serve.py::test_a_second_signal_ends_it_at_once",
        "test_supervisor.py::test_a_second_signal_ends_it_at_once",
    ),
    "a port that is taken": "test_cli.py::test_serve_says_that_a_port_is_taken",
    "a base that can't be loaded": "test_machine.py::test_a_base_that_can_not_be_loaded",
    "1,000 loads": "test_hot_swap.py::test_a_thousand_loads_leave_nothing_behind",
}

SCALE_TO_ZERO: dict[str, Tests] = {
    "a request while the last replica leaves": "test_supervisor.py::test_a_request_that_comes_while_the_last",
    "100 at zero": (
        "test_supervisor.py::test_a_burst_at_zero",
        "test_machine.py::test_a_burst_at_zero",
    ),
    "starts that fail, then one that doesn't": "test_supervisor.py::test_starts_that_fail_are_tried_again",
    "a start longer than a client waits": (
        "test_machine.py::test_a_start_that_hangs",
        "test_streams.py::test_a_request_is_held_for_its_time",
    ),
    "idle timer and long stream": "test_supervisor.py::test_a_long_stream_is_no_idle_time",
    "prefetch while cold": "test_machine.py::test_a_held_or_prefetched_adapter",
    "two routers wake at once": "test_supervisor.py::test_two_routers_that_wake_at_once",
    "a replica dies while the queue waits": "test_streams.py::test_who_is_being_answered_outwaits",
    "Retry-After": "test_http_status.py::test_who_gets_no_replica_is_told_when_to_come_again",
    "min_replicas 1": "test_supervisor.py::test_min_replicas_stay",
}

WITHSTOOD: dict[str, dict[str, Tests]] = {
    "A": SAFETENSORS_BYTES,
    "B": ADAPTER_CONFIG,
    "C": WEIGHTS,
    "D": UPLOADS,
    "E": IDS,
    "G": HOT_SWAP,
    "H": OBJECT_STORE,
    "I": DATABASE,
    "J": PROCESSES,
    "K": SCALE_TO_ZERO,
}
