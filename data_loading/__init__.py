"""The parts of data_utils: files, records, sources, templates, tokenise, batching, report."""
