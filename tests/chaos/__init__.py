"""A program that breaks everything at random for as long as one likes, and then counts rows. See `__main__`."""
