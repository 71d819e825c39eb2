"""Stage base: write the model and tokenizer that training starts from."""
