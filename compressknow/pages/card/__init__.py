"""Report card of compressed models against their original: verdict, page, Markdown, JSON."""
