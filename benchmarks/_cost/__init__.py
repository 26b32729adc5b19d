"""The parts of cost.py: what takes turns, models to take, processes that share, counts by arithmetic, tables, picture."""
