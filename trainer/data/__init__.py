"""What is trained on: the protocol of a source, folders of people, the doctor."""
