"""Commands of the command line that are more than a table of measurements, one module each."""
