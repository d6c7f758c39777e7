"""Fast paths and what they need of devices and processes; README.md in this folder lists them."""
