"""The commands of `elmkernels bench`, one file each."""
