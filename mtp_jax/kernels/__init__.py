"""Fast forms of plain maths. `sharding.platform` chooses between them."""
