"""Small training scripts on the frameworks that people use: plain, with Opacus, and with dpfix."""
