"""The machine's side: host process, parked process, replicas, engine, slots, LoRA layers."""
