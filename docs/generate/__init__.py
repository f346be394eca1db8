"""What the documents repeat of code and of measured files, written by a program."""
