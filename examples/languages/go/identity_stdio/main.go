// The identity on standard input and output: go build -o identity . ; argo-streams conform --strict-bytes -- ./identity
package main

import (
	"bufio"
	"io"
	"log"
	"os"
)

func main() {
	in, out := bufio.NewReaderSize(os.Stdin, 1<<16), bufio.NewWriterSize(os.Stdout, 1<<16)
	for {
		line, err := in.ReadBytes('\n') // bufio.Scanner has a limit of 64 KiB and drops carriage returns
		if _, err := out.Write(line); err != nil {
			log.Fatal(err)
		}
		if err != nil || in.Buffered() == 0 { // nothing more is there: answer before the next read
			if err := out.Flush(); err != nil {
				log.Fatal(err)
			}
		}
		if err == io.EOF {
			return
		} else if err != nil {
			log.Fatal(err)
		}
	}
}
