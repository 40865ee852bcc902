//go:build before013

package main

import "github.com/emersion/go-smtp"

// The library as Debian 12 has it.
type backend struct{ conversation *conversation }

func (b backend) Login(*smtp.ConnectionState, string, string) (smtp.Session, error) {
	return nil, smtp.ErrAuthUnsupported
}

func (b backend) AnonymousLogin(*smtp.ConnectionState) (smtp.Session, error) {
	return &session{keeper{taken: &b.conversation.taken}}, nil
}

type session struct{ keeper }

func (s *session) Mail(from string, _ smtp.MailOptions) error {
	s.sender, s.recipients = from, nil
	return nil
}

func (s *session) Rcpt(to string) error {
	s.recipients = append(s.recipients, to)
	return nil
}
