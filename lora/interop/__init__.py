"""Exchange with other LoRA formats."""
