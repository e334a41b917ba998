"""Values everyone speaks about, and pure rules over them: no I/O, no clock, no chance."""
