"""A run and its folder: trained, checkpointed, resumed, finished, read again, scored."""
