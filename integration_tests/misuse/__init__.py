"""An adversary that draws public calls, and the faults that prove it finds them."""
