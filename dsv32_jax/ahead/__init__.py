"""Programs compiled for devices that need not exist, and what they need."""
