"""Which variables of a model are compressed, for whom and when; whole models; stepping in the backward pass."""
