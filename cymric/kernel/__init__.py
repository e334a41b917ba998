"""What Linux is told: ports for links, routes and commands, their real and fake adapters."""
