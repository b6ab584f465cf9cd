"""The same model, faster or smaller. Optional: nothing in the core knows these files."""
