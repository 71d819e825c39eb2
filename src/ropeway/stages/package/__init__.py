"""Stage package: the model in a form that other loaders read, checked in a fresh interpreter."""
