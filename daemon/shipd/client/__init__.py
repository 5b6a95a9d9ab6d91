"""The sending side: what a trainer or ``shipctl`` uses to push a version and to ask a daemon questions."""
