"""Stage base: the model and tokenizer that training starts from."""
