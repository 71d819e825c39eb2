"""Stage tokenize: every sequence to tokens, once; what records are compared by."""
