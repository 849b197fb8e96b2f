"""Pictures from data sets, folders and files."""
