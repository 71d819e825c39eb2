"""Stage package: the model as others load it, checked in a clean process."""
