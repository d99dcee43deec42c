"""A sonnet of our own that keeps the rules."""

from __future__ import annotations

SONNET = """\
The evening lays its shadow on the hill
And every window keeps a little light;
The river, having turned the final mill,
Goes down to meet the ocean and the night.
A farmer calls his cattle from the field,
A mother sings beside a narrow bed,
And all the gardens of the village yield
The scent of summer and of rising bread.
I walk the road that I have always known
And count the stars above the chapel wall;
No traveller is ever quite alone
Who hears the distant water gently fall.
So let the darkness gather and descend:
The longest road is shorter with a friend."""
