"""The recipe that makes pico: data, losses, schedule. Needs the extra 'eval'."""
