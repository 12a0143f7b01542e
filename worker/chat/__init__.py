"""From a conversation to a prompt, where the inference library does not do it itself."""
