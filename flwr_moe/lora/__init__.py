"""LoRA experts: small adapters on frozen layers, with PEFT's conventions."""
