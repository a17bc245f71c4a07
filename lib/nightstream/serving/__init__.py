"""State, refresh, commit, and the two speeds that call them."""
