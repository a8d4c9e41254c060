"""What an auction's clock may do. Standard library only: no clock is read here, nothing awaits, nothing is written."""
