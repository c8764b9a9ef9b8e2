"""Many seeds side by side: over the cores of this machine, or over a Ray of your own."""
