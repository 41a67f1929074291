"""Other people's files to our models and back: for each source a table of names, then one loop."""
