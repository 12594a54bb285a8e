"""Recognise and read what users have on disk. The only place that knows file formats and tensor names."""
