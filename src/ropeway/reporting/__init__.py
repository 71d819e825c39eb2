"""HTML pages, model cards, plots and tables from the output files of stages."""
