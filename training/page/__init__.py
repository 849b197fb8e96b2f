"""The page of `ddim-plugin demo`, which a wheel and a Space carry as `app.py`."""
