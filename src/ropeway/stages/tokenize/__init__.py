"""Stage tokenize: tokenize every sequence once, and hash its text for deduplication and decontamination."""
