"""When and where stages run, and what follows them: DVC, Prefect, publishing, review, clean-up."""
