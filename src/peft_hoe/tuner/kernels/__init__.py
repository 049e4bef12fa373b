"""What lies between the two products of a HoE module."""
