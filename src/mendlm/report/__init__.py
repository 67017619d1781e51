"""Reports: records of what was done, and what is made of them."""
