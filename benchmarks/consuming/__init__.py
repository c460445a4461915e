"""Measures consuming beside what one writes by hand, and beside FastStream."""
