"""From the desired picture to the kernel: the loop, and one manager per concern."""
