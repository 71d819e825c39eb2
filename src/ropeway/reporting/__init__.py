"""Pages, cards, plots and tables, made from what stages wrote."""
