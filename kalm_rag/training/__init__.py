"""The recipe that makes pico, and the one that adapts a T5Gemma 2 checkpoint. Needs the extra 'eval'."""
