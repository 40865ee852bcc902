// go-smtp for `gateway bench`: answers the questions of peers.py, a JSON object a line.
// The server is the library's own, on a listener that hands out ends of net.Pipe.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/emersion/go-smtp"
)

type step struct {
	reads   [][]byte
	replies int
}

// UnmarshalJSON reads [[octets, ...], replies].
func (s *step) UnmarshalJSON(text []byte) error {
	return json.Unmarshal(text, &[]interface{}{&s.reads, &s.replies})
}

type question struct {
	Task *struct {
		Kind  string `json:"kind"`
		Steps []step `json:"steps"`
	} `json:"task"`
	Answer  bool    `json:"answer"`
	Seconds float64 `json:"seconds"`
}

type mail struct {
	sender     string
	recipients []string
	content    []byte
}

// The backend's half: what every session of either version of the library keeps.
type keeper struct {
	sender     string
	recipients []string
	taken      *[]mail
}

func (k *keeper) Reset()        {}
func (k *keeper) Logout() error { return nil }

func (k *keeper) Data(r io.Reader) error {
	content, err := io.ReadAll(r)
	if err == nil {
		*k.taken = append(*k.taken, mail{k.sender, k.recipients, content})
	}
	return err
}

// listener hands out the connections that are put into it.
type listener struct{ connections chan net.Conn }

func (l *listener) Accept() (net.Conn, error) {
	connection, ok := <-l.connections
	if !ok {
		return nil, errors.New("closed")
	}
	return connection, nil
}
func (l *listener) Close() error   { return nil }
func (l *listener) Addr() net.Addr { return &net.IPAddr{} }

type conversation struct {
	steps []step
	wire  net.Conn
	heard chan int // codes, as they come
	taken []mail
	codes []int
}

func (c *conversation) hear() {
	reader := bufio.NewReader(c.wire)
	for {
		line, err := reader.ReadString('\n')
		if err != nil {
			close(c.heard)
			return
		}
		if len(line) > 4 && (line[3] == ' ' || line[3] == '\r') {
			c.heard <- int(line[0]-'0')*100 + int(line[1]-'0')*10 + int(line[2]-'0')
		}
	}
}

func (c *conversation) replies(count int) error {
	for ; count > 0; count-- {
		code, ok := <-c.heard
		if !ok {
			return errors.New("it ended the conversation")
		}
		c.codes = append(c.codes, code)
	}
	return nil
}

func (c *conversation) once() error {
	c.taken, c.codes = nil, c.codes[:0]
	for _, step := range c.steps {
		for _, octets := range step.reads {
			if _, err := c.wire.Write(octets); err != nil {
				return err
			}
		}
		if err := c.replies(step.replies); err != nil {
			return err
		}
	}
	return nil
}

func begin(steps []step) (*conversation, error) {
	ours, theirs := net.Pipe()
	c := &conversation{steps: steps, wire: ours, heard: make(chan int, 1024)}
	server := smtp.NewServer(backend{c})
	server.Domain = "peer"
	server.MaxRecipients = 1000
	server.MaxMessageBytes = 64 << 20
	server.EnableSMTPUTF8 = true
	connections := make(chan net.Conn, 1)
	connections <- theirs
	go server.Serve(&listener{connections})
	go c.hear()
	if err := c.replies(1); err != nil {
		return nil, err
	}
	if _, err := c.wire.Write([]byte("EHLO client.example\r\n")); err != nil {
		return nil, err
	}
	return c, c.replies(1)
}

func (c *conversation) answer() interface{} {
	mails := []map[string]interface{}{}
	for _, one := range c.taken {
		sum := sha256.Sum256(one.content)
		mails = append(mails, map[string]interface{}{
			"from": one.sender, "to": one.recipients, "octets": len(one.content), "sha256": hex.EncodeToString(sum[:]),
		})
	}
	return map[string]interface{}{"replies": c.codes, "mails": mails}
}

func (c *conversation) seconds(least float64) (float64, error) {
	for times := 1; ; {
		start := time.Now()
		for i := 0; i < times; i++ {
			if err := c.once(); err != nil {
				return 0, err
			}
		}
		spent := time.Since(start).Seconds()
		if spent >= least {
			return spent / float64(times), nil
		}
		more := int(float64(times) * least / (spent + 1e-9))
		if times *= 2; more > times {
			times = more
		}
	}
}

func main() {
	// As everybody else: one core for both ends.
	runtime.GOMAXPROCS(1)
	input, output := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var work *conversation
	for {
		var asked question
		if input.Decode(&asked) != nil {
			return
		}
		told := map[string]interface{}{}
		var err error
		switch {
		case asked.Task != nil:
			if work != nil {
				work.wire.Close()
			}
			work, err = begin(asked.Task.Steps)
		case asked.Answer:
			if err = work.once(); err == nil {
				told["answer"] = work.answer()
			}
		default:
			told["seconds"], err = work.seconds(asked.Seconds)
		}
		if err != nil {
			told = map[string]interface{}{"broken": err.Error()}
		}
		output.Encode(told)
	}
}
