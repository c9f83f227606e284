"""Language models looked into: their parts and units, their heads, and their pretrainings."""
