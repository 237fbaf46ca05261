"""What a code means: number formats and the transformation of a variable."""
