"""Parts of cost.py: sides that take turns, models, processes that share, counts by arithmetic, tables, the picture."""
