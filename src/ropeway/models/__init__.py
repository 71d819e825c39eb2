"""The model and its tokenizer: RoPE scaling, chat template, attention, LoRA."""
