"""The dataset format, and the programs that record and convert datasets."""
